"""Networks of other systems as UNet2DModel, and back: the same tensors under other names."""
