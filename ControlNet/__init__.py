"""ControlNet on Stable Diffusion 1.5: an edge map and a text in, a picture out.

Zhang, Rao & Agrawala, "Adding Conditional Control to Text-to-Image Diffusion Models", ICCV 2023, on
Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022.  The modules carry the names
of the official checkpoint's tensors, so that `control_sd15_canny.pth` loads strictly.  Nothing in here knows of the
rest of the project.
"""
