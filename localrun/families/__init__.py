"""How a family of models writes what the others also do: thinking, tool calls, chat templates."""
