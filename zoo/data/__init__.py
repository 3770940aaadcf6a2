"""Text to tokens on disk, and tokens to batches. numpy only; `datasets`, pyarrow and zstandard are imported where
used."""

from zoo.data.cache import TokenData, open_cache, prepare
from zoo.data.load import load_data
from zoo.data.windows import TrainingOrder, evaluation_batch, evaluation_windows, num_evaluation_windows, training_batch

__all__ = ["TokenData", "TrainingOrder", "evaluation_batch", "evaluation_windows", "load_data",
           "num_evaluation_windows", "open_cache", "prepare", "training_batch"]
