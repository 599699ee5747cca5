import torchvision_compat  # noqa: F401  must come before the package's first import of torchvision
