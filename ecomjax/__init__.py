"""ecomjax: LoRA-tuned, merged and few-shot language models for e-commerce tasks, in JAX."""

__version__ = "0.1.0"
