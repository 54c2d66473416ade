"""Reports: one HTML file that holds everything it shows and fetches nothing."""

from headscope.report.page import index_page as index_page
