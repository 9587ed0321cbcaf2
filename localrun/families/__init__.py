"""How each family of models writes its thinking, tool calls and chat prompts. Never imports the engine."""
