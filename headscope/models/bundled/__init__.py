"""Two tiny trained models that come with headscope, and the sentences that they can read."""
