from .answers import Score as Score
from .answers import TaskAnswers as TaskAnswers
from .choices import ACC as ACC
from .documents import TaskDocuments as TaskDocuments
from .reading import TaskFacts as TaskFacts
from .reading import read_lm_eval as read_lm_eval
from .source import file_of as file_of
from .source import is_lm_eval as is_lm_eval
