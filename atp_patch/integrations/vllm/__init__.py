"""vLLM serves models with fewer visual tokens: a plugin that vLLM finds by its entry point.

    ATP_PATCH_VLLM="method=divprune,keep=0.25" vllm serve llava-hf/llava-1.5-7b-hf

Without the variable the plugin does nothing. With it vLLM serves the models that are named in
:mod:`atp_patch.integrations.vllm.plugin` with fewer tokens, and refuses all others.
"""
