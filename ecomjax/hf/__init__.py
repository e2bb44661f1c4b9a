"""Weights and tokenizers of other formats: Hugging Face folders, GGUF files, PEFT adapters."""
