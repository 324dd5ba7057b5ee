"""Span corruption, corpora in many languages, code whose white space survives, and how what is generated is scored."""
