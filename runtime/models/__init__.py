"""The models: a checkpoint's folder -> a decoder that computes one step's batch.

config.py    config.json -> ModelConfig, or a refusal that names the field
weights.py   where a model lies, what it must hold, safetensors -> tensors
rope.py      rotary frequencies, their scaling rules, cos/sin tables
layers.py    linear layers and norms whose rows do not depend on the batch
llama.py     the decoder of the Llama family
"""
