"""The forms in which exemplars are kept: what is stored of an image, and what pictures come back from it.

One file each, found by being in this folder.  A form's module has a table FORMS: the head of its name ("edges" in
"edges@64"; "edges+" in "edges+webp:10@32", which has another form's name behind the "+") -> a function of (Spec,
Preset) that returns the form; and, where other names than these heads are to be listed, EXAMPLES.  Everything else
(plan, resume, verify, repair, copies on demand, records, budget) works through the contract of `Form`, in form.py.
names.py parses names.
"""

from compress.forms.form import OTHERWISE, WRONG_SIZE, Condition, Form, Request, decoded, pixels, plural, resize_back
from compress.forms.names import Spec, examples, files_named, form_named
from utils.data.codecs import reduced

__all__ = [
    "OTHERWISE", "WRONG_SIZE", "Condition", "Form", "Request", "Spec", "decoded", "examples", "files_named",
    "form_named", "pixels", "plural", "reduced", "resize_back",
]  # fmt: skip
