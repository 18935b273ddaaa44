"""GPT-2 and its variants, with a choice of residual rule, and what one measures in them. In the order in which one reads it:

gpt          the model (loss: of the head; generate: sampling)
layers       attention and MLP (attention: their optional parts)
residual     how the output of a sublayer is added to the stream
config       all settings
scale, unit_norm    learned scales and vectors of unit length, as in nGPT
probes       measurements on a batch (collapse, turns: of the stream; spectra: of weights)
exponents, layer_map    signal propagation at the start, measured and derived
convert      weights of Hugging Face and nanoGPT
"""
