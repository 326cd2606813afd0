"""The model side: families, requests, the tapped forward, gradients, words; no method."""
