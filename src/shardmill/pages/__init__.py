"""What people look at: pictures, the page of a report, tables of its figures, and the model card.

    pictures   figures -> SVG
    page       a report -> one HTML file that needs nothing from elsewhere
    card       a report -> README.md of the result on the Hub
    tables     a report -> JSON or Parquet, one row for each tensor

Nothing here reads or writes a file. Names and reasons are foreign text: they are escaped wherever they stand.
"""
