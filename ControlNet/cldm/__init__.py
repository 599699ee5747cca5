"""ControlNet: the model, its samplers, and reading weights."""

if __name__ == "cldm":  # imported with the ControlNet folder itself on sys.path, as published scripts do
    import controlnet_aliases

    controlnet_aliases.enter(__name__)
