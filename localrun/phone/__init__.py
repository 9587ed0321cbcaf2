"""A folder for phones: the model, the page that runs it in a browser, and cards for apps."""
