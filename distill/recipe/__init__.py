"""Every setting of `teach` and `eval`, declared once: flags, files, recipe.json and the reference come from here."""
