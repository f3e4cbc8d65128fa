"""From records to one page: the book of results, its numbers, tables, figures and words, and the page itself.

The report computes no measurement: it reads ``record.json`` files and arranges what they say. Nothing here imports
torch, and importing this package imports nothing else.
"""
