import torchvision_compat  # noqa: F401  transformers imports torchvision on its way
