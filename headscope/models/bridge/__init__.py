"""Models of transformer-lens (``TransformerBridge``); hooks are named here and in ``hf`` only."""
