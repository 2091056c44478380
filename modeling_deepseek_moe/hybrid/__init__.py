"""An accelerator that is smaller than the model: attention, dense and shared parts and the cache on it, experts elsewhere.

`placement` says where what lies, `costs` where what is computed, `crossing` how hidden states come and go, `layer` what a
layer computes then; `slots` are experts in the accelerator's memory, `copies` how they get there, `held` those that are used
most; `prediction` how
fast that will be, `model` what a user sees of it.
"""
