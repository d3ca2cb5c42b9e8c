"""Users' data as it is, row by row, each as a conversation whose last message is the reference reply.

A file's first bytes give its format (`formats`, by `texts` and `tables`), a row's columns its kind (`kinds`), each
turn what it becomes (`turns`), and `examples` the whole. `problems` says once what is wrong with many rows;
`holdout`, `shapes`, `synthetic`.
"""
