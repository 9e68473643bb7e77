"""bough: a language for LLM programs, and the runtime made for it."""
