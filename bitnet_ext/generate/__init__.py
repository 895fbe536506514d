"""Text in, text out: tokenizers, chat templates, sampling and the generation loop."""
