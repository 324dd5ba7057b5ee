"""Work on whole batches of documents at once: words, signatures, signals, pages, lists."""
