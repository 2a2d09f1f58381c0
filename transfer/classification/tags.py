"""What an image may be to a class, as in VOC's own files.

Nothing is imported here: each of the processes that fit SVMs imports this file.
"""

PRESENT = 1
DIFFICULT = 0  # every object of the class is marked difficult: neither present nor absent
ABSENT = -1
