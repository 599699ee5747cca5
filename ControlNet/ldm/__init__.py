"""Latent diffusion: the UNet, the autoencoder, the text encoder."""

if __name__ == "ldm":  # imported with the ControlNet folder itself on sys.path, as published scripts do
    import controlnet_aliases

    controlnet_aliases.enter(__name__)
