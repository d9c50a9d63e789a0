"""Advice of a language model: who is asked, what is answered, and how it reaches the agent (docs/llm.md)."""
