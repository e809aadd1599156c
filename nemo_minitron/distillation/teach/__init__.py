"""A teacher's answers, kept: `minitron teach` writes a folder of them, distillation reads it in the teacher's place.

`header` says what is in a folder, `forms` how an answer is written as tensors, `listing` which samples are answered in
which order; `writer` runs the teacher, `folder` reads what it wrote.
"""
