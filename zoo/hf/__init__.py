"""The zoo's models in Hugging Face's libraries: a folder for `transformers`, the hub, and the classes for both."""
