"""Two tiny trained models that come with headscope, and the scripts that made them."""
