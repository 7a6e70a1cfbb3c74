"""Renders the templates of a file with transformers, and records what comes out.

    pip install transformers==4.57.6 jinja2==3.1.6
    python make_templates.py ../../tests/data/text/jinja.json

The file has a `context` and `cases`, each with its `template`. Written anew: `text`, what jinja2
renders as transformers sets it up, or `error`, the class of the exception.
"""

import json
import sys

from transformers.utils.chat_template_utils import _compile_jinja_template


def render(template, context):
    try:
        return {"template": template, "text": _compile_jinja_template(template).render(**context)}
    except Exception as error:  # whatever a template can raise
        return {"template": template, "error": type(error).__name__}


def main(path):
    with open(path, encoding="utf-8") as file:
        recorded = json.load(file)
    recorded["cases"] = [render(case["template"], recorded["context"]) for case in recorded["cases"]]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(recorded, file, ensure_ascii=False, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
