"""``mini``: a small masked-diffusion multimodal LLM that ships, trained, inside the package."""
