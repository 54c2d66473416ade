"""For notebooks: look at attention on a text, and ask what one head does."""

from headscope.interactive.explanation import Explanation as Explanation
from headscope.interactive.explanation import explain as explain
from headscope.interactive.view import attention_view as attention_view
