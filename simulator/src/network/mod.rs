//! Network time: topologies, flows with max-min sharing, all-to-all, collectives, point-to-point.
