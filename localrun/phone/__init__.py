"""Export a folder for phones: the model, a page that runs it in a browser, and instructions for apps."""
