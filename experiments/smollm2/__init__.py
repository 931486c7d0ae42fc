"""Doc-to-LoRA on SmolLM2-135M-Instruct and real English text, from the fetched package to a page of figures."""
