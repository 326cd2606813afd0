"""What several families share; nothing here knows which family calls it."""
