"""One transcoder a layer, trained side by side in a single pass over the text."""
