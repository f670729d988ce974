"""Help and mistakes in options without the seconds that torch, Lightning and transformers take to import.

``options.json`` describes the options of every command; it is written from the parsers themselves
(``python docs/describe.py``), and a test compares the two. ``parser`` makes of it a parser that knows
the same names, types and defaults, and takes for granted what only a class can tell; ``check`` is what a command line
goes through before the command's module is imported.
"""
