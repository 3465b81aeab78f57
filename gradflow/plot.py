"""Every picture under one name: `gf.plot.function(ax, net)`, `gf.plot.flow_figure(flow, data)`.

What ends in `figure` or `animation` is a whole one; everything else draws on the `ax` it is given, labels its axes with
their units, and returns the artists it drew.
"""

from gradflow.animation import flow_animation as flow_animation
from gradflow.animation import moving_function as moving_function
from gradflow.animation import moving_neurons as moving_neurons
from gradflow.flow_plot import breakpoints as breakpoints
from gradflow.flow_plot import convergence as convergence
from gradflow.flow_plot import flow_figure as flow_figure
from gradflow.flow_plot import function as function
from gradflow.flow_plot import neurons as neurons
from gradflow.flow_plot import residual as residual
from gradflow.study_plot import claim_table as claim_table
from gradflow.study_plot import claims as claims
from gradflow.study_plot import population_error as population_error
from gradflow.study_plot import regions as regions
from gradflow.study_plot import study_figure as study_figure
from gradflow.style import finish as finish
from gradflow.style import legend_above as legend_above
from gradflow.sweep_plot import error_against_samples as error_against_samples
from gradflow.sweep_plot import phase_diagram as phase_diagram
from gradflow.sweep_plot import regions_against_neurons as regions_against_neurons
from gradflow.sweep_plot import success_against_width as success_against_width
from gradflow.sweep_plot import sweep_figure as sweep_figure
