"""Parts of :mod:`captum_dcam.adapters.diffusion_gemma`: pictures, sampling, the model itself."""
