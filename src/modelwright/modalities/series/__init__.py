"""Daily series: reading them, totals of periods, and the hinge of a value over temperature."""
