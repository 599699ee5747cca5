"""Edge detection, and image shapes."""

if __name__ == "annotator":  # imported with the ControlNet folder itself on sys.path, as published scripts do
    import controlnet_aliases

    controlnet_aliases.enter(__name__)
