r"""How far an explanation can be trusted: what the model and the maps themselves say of it.

Nothing here tells whether a word is true.
"""
