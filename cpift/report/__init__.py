"""Pages for readers, from plain data: no model is opened here.

`write` writes all that a run reports: `page` as HTML, `files` as Markdown and CSV. `picture` and `chart` are what a
page begins with, `plots` its other plots. `data` is what they show, `facts` what of it is looked up in scores and rows.
`html`, `style` and `svg` are the design. `index` lists the pages of a folder, `model_card` is the README of a model,
`tensor_names` tells layers and kinds.
"""
