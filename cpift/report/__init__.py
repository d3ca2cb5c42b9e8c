"""Pages for readers, from plain data: no model, no run is opened here.

`write` (all of a run's), `page`, `data`, `plots`, `html`, `style`, `svg`, `index`, `model_card`, `tensor_names`.
"""
