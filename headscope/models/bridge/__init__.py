"""Models of transformer-lens (``TransformerBridge``); hook names occur only here and in ``hf``."""
