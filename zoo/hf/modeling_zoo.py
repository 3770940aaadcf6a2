"""A model of the zoo for `transformers`. All of its code is in the package `zoo`, which has to be installed: nothing of
it is here, and nothing in config.json is executed."""

try:
    from zoo.hf import causal_lm
except ImportError as error:
    raise ImportError("this model needs the project that it was exported from (the Python package zoo-lm, imported as "
                      f"`zoo`), which is not installed here or is older than the model: {error}") from None


# Defined here, so that `save_pretrained` of transformers copies this file along with the weights.
class ZooConfig(causal_lm.ZooConfig):
    pass


class ZooForCausalLM(causal_lm.ZooForCausalLM):
    config_class = ZooConfig
