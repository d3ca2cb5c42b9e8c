"""Pages for readers, from plain data: no model is opened here.

`write` writes all that a run reports: `page` as HTML, `files` as Markdown and CSV. `picture` and `chart` are what a
page begins with, `plots` its other plots, `places` where tasks moved the model and which experts cores touch. `data`
is what they show, `facts` what of it is looked up in scores and rows.
`html`, `style` and `svg` are the design. `index` lists the pages of a folder, `model_card` is the README of a model,
`tensor_names` tells layers and kinds.

    >>> from cpift.report import csv_text, md_table
    >>> print(md_table(["model", "score"], [["final", "0.75"]]))
    | model | score |
    | --- | --: |
    | final | 0.75 |
    >>> csv_text(["model"], [["=1+1"]])  # no formula in a spreadsheet
    "model\\n'=1+1\\n"
"""

from typing import TYPE_CHECKING

from cpift.lazy import handed_out

if TYPE_CHECKING:
    from cpift.report.data import ReportData as ReportData
    from cpift.report.data import Sample as Sample
    from cpift.report.files import csv_text as csv_text
    from cpift.report.files import md_table as md_table
    from cpift.report.html import Plot as Plot
    from cpift.report.html import document as document
    from cpift.report.html import figure as figure
    from cpift.report.html import table as table
    from cpift.report.model_card import write_model_card as write_model_card
    from cpift.report.svg import as_svg as as_svg
    from cpift.report.svg import new_figure as new_figure
    from cpift.report.write import show_result as show_result
    from cpift.report.write import summary as summary
    from cpift.report.write import write_run as write_run
else:
    __getattr__, __dir__ = handed_out(__name__)
