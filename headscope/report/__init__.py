"""Reports as single, self-contained HTML files."""

from headscope.base.result import Facts as Facts
from headscope.base.result import Rows as Rows
from headscope.base.result import Section as Section
from headscope.base.result import Words as Words
from headscope.report.joined import RunPart as RunPart
from headscope.report.joined import read_run as read_run
from headscope.report.joined import report_page as report_page
from headscope.report.page import AttentionView as AttentionView
from headscope.report.page import index_page as index_page
from headscope.report.page import sections_page as sections_page
from headscope.report.sections import Picture as Picture
